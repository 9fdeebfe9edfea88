"""What every part may use: native modules, files, progress, arrays of other libraries, plots."""
