"""What INPUT is: from a path, an address, a manifest or an archive to a lazy stream of rows."""
