"""One rank's work: configuration, data, model, step loop, metrics, checkpoints."""

import logging

# Where torchao is installed, transformers imports it, and both it and torch warn of what is none of a user's business:
# kernels for other devices, and a registration that newer torch does without.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
