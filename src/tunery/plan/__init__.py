"""What a run will need, before it starts: memory, time, disk, and the smallest change that makes it fit."""
