"""The report of a reproduction: our figures beside the published ones.

records    reading what stages left
figures    figures side by side
ablations  one change at a time
summary    what holds, in sentences
text       tables and cells of Markdown
sections   the report's sections
markdown   the whole text
plots      its plots
write      report.md and report.json
"""
