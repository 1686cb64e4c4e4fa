"""The contract of stores."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ties_ray.errors import InputError
from ties_ray.stores import Listing, NoUpload, Part, WritableStore, join, within

Place = tuple[WritableStore, str]
"""A store and the URI of an empty folder in it."""


class StoreContract:
    """Every store keeps objects, pins, listings and uploads alike.

    A subclass provides the fixture `place`: a store and the URI of an empty folder. Parts have 5 MiB, the least that S3
    takes, so that an upload of the suite has 11 MiB.
    """

    part_bytes = 5 << 20

    @pytest.fixture
    def place(self) -> Place:
        """Return a store and the URI of an empty folder in it."""
        raise NotImplementedError("a subclass says where")

    def test_a_small_object_comes_back_whole_with_the_pin_that_put_returned(self, place: Place) -> None:
        store, root = place
        uri = within(root, "a/small.json")
        before = replace(store.meter)
        pin = store.put(uri, b"hello world")
        assert store.meter.bytes_written - before.bytes_written == 11
        assert store.get(uri, 100) == (pin, b"hello world")
        assert store.get_pinned(pin) == b"hello world"
        assert (pin.uri, pin.size) == (uri, 11)
        assert pin.etag

    def test_head_returns_no_more_than_there_is(self, place: Place) -> None:
        store, root = place
        pin = store.put(join(root, "x"), b"0123456789")
        before = replace(store.meter)
        assert store.head(pin.uri, 4) == (pin, b"0123")
        assert (store.meter.requests - before.requests, store.meter.bytes_read - before.bytes_read) == (1, 4)
        assert store.head(pin.uri, 10) == (pin, b"0123456789")
        assert store.head(pin.uri, 4096) == (pin, b"0123456789")
        assert store.head(pin.uri, 0) == (pin, b"")

    def test_an_empty_object_has_a_pin(self, place: Place) -> None:
        store, root = place
        pin = store.put(join(root, "empty"), b"")
        assert store.head(pin.uri, 100) == (pin, b"")

    def test_an_object_above_the_limit_is_refused(self, place: Place) -> None:
        store, root = place
        store.put(join(root, "x"), b"0123456789")
        with pytest.raises(InputError, match=r"10 bytes.*at most 9"):
            store.get(join(root, "x"), 9)

    def test_a_missing_object_is_not_found(self, place: Place) -> None:
        store, root = place
        with pytest.raises(FileNotFoundError, match="nothing"):
            store.head(join(root, "nothing"), 10)

    def test_a_range_lands_in_the_callers_buffer_and_is_counted(self, place: Place) -> None:
        store, root = place
        data = bytes(range(256)) * 4096
        pin = store.put(join(root, "x"), data)
        before = replace(store.meter)
        for start, stop in [(0, 1), (0, len(data)), (1000, 700_001), (len(data) - 1, len(data))]:
            buffer = bytearray(b"\xee" * (stop - start + 2))
            store.read(pin, start, memoryview(buffer)[1:-1])
            assert buffer == b"\xee" + data[start:stop] + b"\xee"
        assert store.meter.requests - before.requests == 4
        assert store.meter.bytes_read - before.bytes_read == 2 + len(data) + 699_001

    def test_many_threads_read_at_once(self, place: Place) -> None:
        store, root = place
        data = bytes(range(256)) * 256
        pin = store.put(join(root, "x"), data)

        def read(start: int) -> bytes:
            buffer = bytearray(4096)
            store.read(pin, start, memoryview(buffer))
            return bytes(buffer)

        starts = range(0, 61_440, 1000)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(read, starts)) == [data[start : start + 4096] for start in starts]

    def test_a_replaced_object_is_refused_even_at_the_same_size(self, place: Place) -> None:
        store, root = place
        pin = store.put(join(root, "x"), b"old content")
        store.put(join(root, "x"), b"new content")
        buffer = bytearray(3)
        with pytest.raises(InputError, match=r"/x: changed since the plan"):
            store.read(pin, 0, memoryview(buffer))

    def test_a_deleted_object_is_refused(self, place: Place) -> None:
        store, root = place
        pin = store.put(join(root, "x"), b"old content")
        store.delete(pin.uri)
        store.delete(pin.uri)  # nothing happens
        with pytest.raises(InputError, match=r"/x: changed since the plan"):
            store.read(pin, 0, memoryview(bytearray(3)))

    def test_a_listing_is_sorted_and_one_level_deep(self, place: Place) -> None:
        store, root = place
        for name in ["b", "a/2", "Z", "a/1", "c/d/e", "caf\u00e9", "with space"]:
            store.put(within(root, name), name.encode())
        listing = store.list(root)
        assert [pin.uri for pin in listing.files] == [
            join(root, name) for name in ["Z", "b", "caf\u00e9", "with space"]
        ]
        assert [pin.size for pin in listing.files] == [1, 1, 5, 10]
        assert listing.folders == (join(root, "a"), join(root, "c"))
        assert store.list(root + "/") == listing
        inside = [pin.uri for pin in store.list(listing.folders[0]).files]
        assert inside == [within(root, "a/1"), within(root, "a/2")]

    def test_a_missing_folder_is_empty(self, place: Place) -> None:
        store, root = place
        assert store.list(join(root, "nowhere")) == Listing((), ())

    def test_parts_make_an_object_in_any_order_and_the_last_writing_wins(self, place: Place) -> None:
        store, root = place
        uri, data = within(root, "out/model.safetensors"), self._data()
        upload = store.begin_upload(uri, len(data))
        self._write(store, uri, upload, 1, b"\x00" * len(data))
        parts = [self._write(store, uri, upload, number, data) for number in (3, 1, 2)]
        listed = store.list_parts(uri, upload)
        assert listed is not None
        assert listed == () or [(p.number, p.size, p.etag) for p in listed] == sorted(p[:3] for p in parts)
        assert store.list(join(root, "out")) == Listing((), ())  # nothing half-made is visible
        pin = store.complete_upload(uri, upload, parts)
        assert store.get(uri, len(data)) == (pin, data)
        assert store.list_parts(uri, upload) is None

    def test_completing_twice_is_completing_once(self, place: Place) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        parts = [self._write(store, uri, upload, number, data) for number in (1, 2, 3)]
        pin = store.complete_upload(uri, upload, parts)
        assert store.complete_upload(uri, upload, parts) == pin

    def test_uploads_under_way_are_those_of_objects_directly_in_a_folder(self, place: Place) -> None:
        store, root = place
        uris = [within(root, name) for name in ("out/b", "out/a", "out/deeper/c", "out-side/d")]
        uploads = {uri: store.begin_upload(uri, self.part_bytes) for uri in uris}
        before = replace(store.meter)
        self._write(store, uris[0], uploads[uris[0]], 1, self._data())
        assert store.meter.bytes_written - before.bytes_written == self.part_bytes
        assert store.list_uploads(join(root, "out")) == tuple(sorted((uri, uploads[uri]) for uri in uris[:2]))
        store.abort_upload(uris[0], uploads[uris[0]])
        assert store.list_uploads(join(root, "out") + "/") == ((uris[1], uploads[uris[1]]),)
        assert store.list_uploads(join(root, "nowhere")) == ()

    def test_an_upload_does_not_take_anothers_object_for_its_own(self, place: Place) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        parts = [self._write(store, uri, upload, number, data) for number in (1, 2, 3)]
        store.put(uri, data)
        store.abort_upload(uri, upload)
        with pytest.raises(InputError, match="upload"):
            store.complete_upload(uri, upload, parts)

    def test_an_aborted_upload_leaves_nothing(self, place: Place) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        part = self._write(store, uri, upload, 1, data)
        store.abort_upload(uri, upload)
        store.abort_upload(uri, upload)  # nothing happens
        assert store.list_parts(uri, upload) is None
        with pytest.raises(NoUpload, match="does not know the upload"):
            store.complete_upload(uri, upload, [part])
        assert store.list(root) == Listing((), ())

    def test_a_part_of_an_unknown_upload_is_refused(self, place: Place) -> None:
        store, root = place
        uri, data = join(root, "x"), self._data()
        upload = store.begin_upload(uri, len(data))
        store.abort_upload(uri, upload)
        with pytest.raises(NoUpload, match="does not know the upload"):
            self._write(store, uri, upload, 1, data)

    def test_a_store_is_not_pickled(self, place: Place) -> None:
        with pytest.raises(TypeError, match="in the process that uses it"):
            pickle.dumps(place[0])

    def _data(self) -> bytes:
        return bytes(range(251)) * ((2 * self.part_bytes + 1000) // 251)

    def _write(self, store: WritableStore, uri: str, upload: str, number: int, data: bytes) -> Part:
        start = (number - 1) * self.part_bytes
        return store.write_part(uri, upload, number, start, memoryview(data)[start : start + self.part_bytes])
