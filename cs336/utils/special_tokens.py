"""Special tokens that more than one part of the package must spell alike."""

END_OF_TEXT = "<|endoftext|>"
