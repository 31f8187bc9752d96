"""Text to rows of token ids, in numpy and Grain: tokenizer, sources, cache, packing, pipeline, in the order of a batch's
way. Import from the modules: `from data.sources import open_source`.
"""
