"""Stands for torchaudio in the reference's environment: heartlib writes files with it, which no test asks of it."""
