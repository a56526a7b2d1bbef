"""The knowledge store: documents of text, pictures and sound in an embedded vector database, to search, edit and cite.

`entries` is what a store holds, `store` the database, `index` its approximate search, `encoders` what embeds, `read`, `triples` and `wordnet`
where documents come from, `ingest` puts them in, `recall` takes them out as citations and a prompt. Nothing here is imported before it is
used: LanceDB comes with the extra `memory`.
"""
