"""What model families look like, as data; which linears share an input, what moves together."""
