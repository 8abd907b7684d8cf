"""Places: never more than there are, by priority and in turn, none lost to who gave up."""

import asyncio

from aprium.envs.places import Places


def test_places_are_taken_by_priority_and_in_turn() -> None:
    served: list[str] = []
    running = most = 0

    async def stay(places: Places, name: str, priority: int) -> None:
        nonlocal running, most
        async with places.taken(priority=priority):
            running += 1
            most = max(most, running)
            served.append(name)
            await asyncio.sleep(0)
            running -= 1

    async def go() -> None:
        places = Places(2)
        visits = [("a", 0), ("b", 0), ("c", 0), ("d", -1), ("e", 0), ("f", -1)]
        await asyncio.gather(*(stay(places, *visit) for visit in visits))

    asyncio.run(go())
    assert "".join(served) == "abdfce" and most == 2


def test_a_place_is_not_lost_to_one_that_no_longer_waits() -> None:
    async def go() -> None:
        places = Places(1)

        async def stay() -> None:
            async with places.taken():
                await asyncio.sleep(0)

        async with places.taken():
            early, late = (asyncio.create_task(stay()) for _ in range(2))
            await asyncio.sleep(0)
            early.cancel()
            await asyncio.sleep(0)
        late.cancel()  # the place was given to it just now
        found = await asyncio.gather(early, late, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in found)
        await asyncio.wait_for(stay(), 1)

    asyncio.run(go())
