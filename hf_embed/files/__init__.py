"""Read files, write them so that they are either complete or absent, and report errors of the file system.

The modules:

    read_files, safe_files    how every file is read and written
    work_files                a long piece of work as files, so that it can be resumed and shared among ranks
    disk                      errors of the file system as one line each
"""
