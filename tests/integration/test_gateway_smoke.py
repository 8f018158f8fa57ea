from tests.integration.gateway_fixtures import *
async def test_smoke(settings, tmp_path):
    async with open_house(settings, tmp_path) as house:
        try:
            r = await house.http.post("/generate", json=SONG); print(r.status_code, r.headers, r.text)
            jid = r.json()["job_id"]
            for path in ("status", "result"):
                r = await house.http.get(f"/generate/{jid}/{path}"); print(r.status_code, r.text)
            for path in ("/health", "/api/gpu", "/", "/nope", "/schema/openapi.json", "/static/nope"):
                r = await house.http.get(path); print(path, r.status_code, dict(r.headers), r.text[:1500])
            r = await house.http.put("/generate"); print(r.status_code, r.headers, r.text)
            r = await house.http.head("/"); print(r.status_code, r.headers, r.text)
            r = await house.http.post("/generate", content=b"{"*300000, headers={"Content-Type": "application/json"}); print(r.status_code, r.text)
            for b in (b'{"lyrics": "\\ud800"}', b'{"lyrics": "\\u0000"}', b'{"lyrics": "a\xff"}', b'{"lyrics":"a","seed":"1"}', b'{"lyrics":"a","seed":-1}', b'{"lyrics":"a","temperature":9}', b'{"lyrics":"a","format":"ogg"}', b'{"lyrics":"a","format":1}', b'{"lyrics":"a","max_duration_ms":1}', b'{"lyrics":"a","x":1}', b'{}', b'[]', b'', b'{"lyrics":"a","seed":99999999999999999999999}', b'{"lyrics":"a","title":"'+b'a'*301+b'"}', b'{"lyrics":"a","temperature":1e999}', b'{"lyrics":"a","temperature":NaN}', b'['*100000, b'{"lyrics":"a","max_duration_ms":100000}', b'{"lyrics":"'+b'a '*10000+b'"}', b'{"lyrics":" ","tags":" "}', b'{"lyrics":"","tags":"pop"}', b'{"lyrics":"\\ud83d\\ude00"}', b'{"lyrics":null}', b'{"lyrics":"a","seed":1.0}', b'{"lyrics":"a","seed":1.5}'):
                r = await house.http.post("/generate", content=b, headers={"Content-Type": "application/json"}); print(b[:60], r.status_code, r.text)
            async with house.watch(jid) as w:
                print(await w.frame())
                await house.stage(jid); await house.progress(jid, 10)
                print(await w.frame()); print(await w.frame())
                await house.complete(jid)
                print(await w.rest())
            async with house.watch(jid, after=0) as w:
                print(await w.rest())
            r = await house.http.get(f"/generate/{jid}/result", headers={"Range":"bytes=5-9"}); print(r.status_code, r.headers, r.text[:1500])
            r = await house.http.head(f"/generate/{jid}/result"); print(r.status_code, r.headers, r.text[:1500])
            r = await house.http.delete(f"/generate/{jid}"); print(r.status_code, r.headers, r.text[:1500])
            m = await house.nc.request("submit.local", json.dumps(SONG).encode(), timeout=5); print(m.data)
            print(await house.js.publish("submit.local", json.dumps(SONG).encode()))
            m = await house.nc.request("submit.local", b'{"lyrics":"a","x\\ny":1}', timeout=5); print(m.data, m.headers)
            print(await house.stop())
        finally:
            print(house.log.read_text())
