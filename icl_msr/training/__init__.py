"""The LightningModule, the DataModule, optimisation, hardware, loggers and callbacks."""
