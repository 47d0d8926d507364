"""result.json: what a run measured, with everything needed to do it again.

In: the dict that a run fills. Out: one JSON file per run, and many of them as one DataFrame. Start with `store`.

    store        create, write and read a result.json, and record in it how a run failed
    schema       check a result against result.schema.json
    dataframe    find and read many results, and turn them into one DataFrame: `qbench.load`
    archive      keep many results in one compressed file
    provenance   the id of a run, digests of its code, and the machine and versions that it ran on
    json_files   write JSON atomically, and read it within limits
"""
