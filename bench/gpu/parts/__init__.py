"""The parts of the GPU check, one file each; `check(options)` gives what it found, with `ok`."""
