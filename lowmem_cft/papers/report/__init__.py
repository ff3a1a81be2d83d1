"""The report of a reproduction: our figures beside the published ones.

figures    figures side by side
ablations  one change at a time
summary    all that there is to say
plots      its plots
write      report.md, by the template report.md.j2, and report.json
"""
