"""The commands of `tavq`, one file each, named as they are typed."""
