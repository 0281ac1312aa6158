"""The speed of ours and of other libraries, side by side."""
