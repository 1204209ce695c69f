"""The network, its weights and its engine; torch lives here and only here."""
