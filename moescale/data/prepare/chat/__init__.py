"""Conversations: read from records, rendered by the tokenizer's own template, with the spans that are learned.

``conversations`` reads records, ``template`` renders, ``spans`` finds the answers, ``render_process`` does all of it in
a process of its own, because a template is a program from somewhere else. ``encode`` makes tokens and targets.
"""
