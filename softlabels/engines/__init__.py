"""Where a dump's shards run. `local` is one process on one device, `devices` one for each of several.

An engine takes shards of rows and the steps that a stage has for them, and leaves whole shards, with receipts, in the
cache. What the rows mean, and what is taken of them, is the stage's affair.
"""
