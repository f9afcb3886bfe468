"""Training: each heavy package has one module (petastorm: data, transformers4rec: model, horovod: dist, horovodrun)."""
