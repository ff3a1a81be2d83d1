"""Papers whose runs can be repeated, stage by stage, and reported beside their published figures.

names         names of stages
paper         a paper as an object
cft           Improving Text Embeddings for Smaller Language Models
prompteol     Scaling Sentence Embeddings with Large Language Models
published     the published figures with their sources
request       which paper, model and share of the run is asked for
results       what stages give
records       the files of a reproduction
stages        stages with inputs, results and resuming
paper_stages  the stages that papers choose from
work          what single stages do
effort        fitting a run into hours
reproduction  a whole reproduction
report/       its report
"""
