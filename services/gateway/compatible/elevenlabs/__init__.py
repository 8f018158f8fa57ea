"""ElevenLabs' API for music."""
