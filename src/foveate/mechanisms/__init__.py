"""Other mathematics than softmax over all keys: each public function beside its definition."""
