"""``python -m tests.shardline.script FILE ...``: runs a file as ``python FILE ...`` does, in the file's folder.

As a module of the tests it is started as a clone of a process that has imported everything.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    file = Path(sys.argv[1])
    os.chdir(file.parent)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(file.parent))
    script = ModuleType("__main__")
    script.__file__ = str(file)
    sys.modules["__main__"] = script
    exec(compile(file.read_text(), str(file), "exec"), script.__dict__)
