"""Data sets, and the DataModule that turns them into batches of views on the device."""
