"""The study: settings, run folder, evaluation, runner. Import from its modules; nothing is loaded here."""
