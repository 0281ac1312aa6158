"""What every room needs: errors, records, config, the run's folder, files, ranks, randomness."""
