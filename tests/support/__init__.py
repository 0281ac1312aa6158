"""What tests share: small runs, toys, processes, ranks, run folders and their readers."""
