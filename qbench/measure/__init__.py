"""What is measured: error, bits, memory, throughput and quality, each in a file of its own."""
