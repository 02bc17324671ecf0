"""From web addresses to clean, deduplicated documents."""
