"""Training. Heavy packages are confined: petastorm to data, transformers4rec to model, horovod to dist, horovodrun."""
