"""Everything that changes, in one SQL schema."""
