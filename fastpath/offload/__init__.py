"""Pure grouping and splitting of frames and datagrams. Knows the wire, never a descriptor."""
