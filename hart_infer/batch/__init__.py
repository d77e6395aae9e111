"""Draw the rows of a file, any number of them, so that a run that is killed goes on where it was.

Rows are cut into chunks (`plan`). A worker draws a chunk, writes its pictures, and at last its part of the manifest, which
makes the chunk finished. Workers live in this process (`driver`) or are actors on Ray (`cluster`).
"""
