"""The command line: ls, stats, top, doctor, clean, and the diagnosis that they give."""
