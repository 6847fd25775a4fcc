"""What we read, one file per kind of record, each with its reader.

``edits`` are facts to change, ``context`` questions with a context, ``rag`` questions with documents. All files come
through ``lines``, which gathers bad lines into one error. A record is a ``record.Record``: its class reads files of it.
"""
