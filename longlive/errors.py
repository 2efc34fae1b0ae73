"""What the user can put right: one exception that means so, and memory that is not enough.

Layer 0. Command lines print the message as one line on stderr and exit with 2; everything else is a bug and
keeps its traceback.
"""

OUT_OF_MEMORY = "out of memory; try low_memory=true, batch_size=1, or a smaller height and width"
_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # as CUDA, the CPU and cuDNN say it


class InputError(ValueError):
    """Bad input from a user: names the offending value or file and says what would be accepted."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, the host or a library had no memory left."""
    return any(sign in str(error) for sign in _MEMORY_SIGNS)
