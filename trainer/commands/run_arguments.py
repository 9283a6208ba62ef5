"""Arguments of the commands that may run code for a run."""

import argparse

from trainer.deploy.allowed_code import AllowedCode


def add_code_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command the switches that allow code."""
    parser.add_argument("--task")
    parser.add_argument("--trust-remote-code", action="store_true")


def allowed_code(options: argparse.Namespace) -> AllowedCode:
    """What a command's switches allow."""
    return AllowedCode(task=options.task, trust_remote_code=options.trust_remote_code)
