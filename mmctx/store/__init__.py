"""The knowledge store: documents of text, pictures and sound in an embedded vector database, to search, edit and cite.

`entries` is what a store holds, `store` the database, `index` its approximate search, `encoders` what embeds. Documents come from `read`
and `graphs`, `ingest` puts them in, `recall` takes them out as citations and a prompt. LanceDB comes with the extra `memory`.
"""
