"""What every room needs and none owns: command lines, files, hashes, devices."""
