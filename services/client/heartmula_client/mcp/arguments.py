"""Arguments that several tools have, as an agent reads them. They have the names and units of ``POST /generate``."""

from typing import Annotated, Literal

from pydantic import Field

JobId = Annotated[str, Field(description="id of a song")]
RecordingId = Annotated[str, Field(description="id of a recording")]
Lyrics = Annotated[
    str,
    Field(
        description="the words of the whole song, a line each; lines such as [Intro], [Verse], [Chorus], [Bridge] and "
        "[Outro] mark sections"
    ),
]
Tags = Annotated[
    str, Field(description="style, divided by commas: genre, instruments, mood, tempo, voice; such as pop,piano,happy")
]
MaxDuration = Annotated[
    int | None, Field(description="longest song wanted, in milliseconds; the model may end it earlier; default 120000")
]
Seed = Annotated[int | None, Field(description="the same seed and request make the same song; random if left out")]
Title = Annotated[str | None, Field(description="written into the file")]
Format = Annotated[Literal["flac", "wav", "mp3", "ogg"] | None, Field(description="of the file; flac if left out")]
Variants = Annotated[int | None, Field(description="songs to make of it, 1 to 4, with seeds in a row")]
Temperature = Annotated[float | None, Field(description="0 always takes the likeliest token; default 1")]
CfgScale = Annotated[float | None, Field(description="how closely lyrics and tags are followed; default 1.5, 1 is off")]
TopK = Annotated[int | None, Field(description="sample among so many of the likeliest tokens; default 50")]
Instrumental = Annotated[bool, Field(description="no singing: lyrics are empty then, or hold section marks alone")]
NotBefore = Annotated[str | None, Field(description="begin then at the earliest: a time such as 2031-05-01T06:30:00Z")]
Key = Annotated[
    str | None,
    Field(
        description="a word of your choice for this request: the call repeated with it returns the same song. Without "
        "it every call makes another song"
    ),
]
WaitSeconds = Annotated[float, Field(ge=0, le=600, description="return after so many seconds at the latest")]
Limit = Annotated[int, Field(ge=1, le=100, description="songs on a page")]
Cursor = Annotated[str | None, Field(description="`next` of the page before")]
State = Annotated[
    Literal["queued", "generating", "decoding", "completed", "failed", "cancelled"] | None,
    Field(description="only songs in this state"),
]
