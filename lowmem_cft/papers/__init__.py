"""Two papers, stage by stage, reported beside their published figures.

request       which paper, model and share of the run is asked for
published     the published figures with their sources
stages        stages with inputs, results and resuming
paper_stages  the stages of each paper
work          what single stages do
effort        fitting a run into hours
reproduction  a whole reproduction
report/       its report
"""
