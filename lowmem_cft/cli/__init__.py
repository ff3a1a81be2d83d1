"""Commands, tables and the progress bar: the only package that knows flags.

    app      the commands
    progress the progress bar
    tables   what is printed of results
    doctor   what this machine offers
"""
