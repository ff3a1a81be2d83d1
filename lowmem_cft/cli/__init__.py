"""Commands, tables and the progress bar: the only package that knows flags.

app        the program: which commands there are, how errors are said
train      commands that make a model
evaluate   commands that use one
reproduce  the command that repeats a paper's run
machine    commands that say what there is
options    options that several commands take
columns    which columns of a file are pairs and scores, asked where it is unclear
files      files that commands read and write
progress   the progress bar
tables     what is printed of results
doctor     what this machine offers
"""
