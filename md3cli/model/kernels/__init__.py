"""What only a GPU runs: its kernels, how torch calls them, and whether they can run here."""
