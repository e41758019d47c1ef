"""The errors of the emulator: what a kernel does wrong, and what the emulator cannot do."""

from __future__ import annotations

from optframe.errors import PluginError


class KernelFault(PluginError):
    """A kernel did what must not be: the message names the kernel, the instruction, and a block and thread of it."""


class Unsupported(PluginError):
    """A PTX text has something that the emulator does not know; the message holds the text."""
