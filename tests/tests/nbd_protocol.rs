//! What the NBD server offers besides reading and writing, as clients no one here wrote see it:
//! holes are told and kept, and requests that cannot be are refused by number while the connection
//! lives on.

use kagami_tests::{Cluster, ClusterOptions, MIB, Node, Tool};
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const SIZE: u64 = 64 * MIB;

/// Mebibytes with data in them.
const DATA: [u64; 3] = [4, 5, 40];

fn mirrored() -> Cluster {
    Cluster::mirrored(ClusterOptions {
        disk_size: SIZE,
        ..ClusterOptions::default()
    })
}

/// A mirror with data here and there, on both replicas.
fn sparse() -> Cluster {
    let cluster = mirrored();
    let mut client = cluster.nbd(Node::A);
    for at in DATA {
        let data = vec![at as u8; MIB as usize];
        client.write(at * MIB, &data, false).expect("a write");
    }
    client.flush().expect("a flush");
    cluster
}

/// Runs a script with libnbd; `sys.argv[1]` is the export.
#[track_caller]
fn nbd_script(script: &str, uri: &str) -> String {
    // The system's own: libnbd's module is Debian's.
    Tool::new("/usr/bin/python3")
        .args(["-c", script, uri])
        .success()
}

#[track_caller]
fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"))
}

/// Offsets and lengths of holes, as `nbdinfo --map` shows them.
fn holes(uri: &str) -> Vec<(u64, u64)> {
    let map = json(
        &Tool::new("nbdinfo")
            .args(["--map", "--json", uri])
            .success(),
    );
    let extents = map.as_array().expect("a list of extents");
    let mut end = 0;
    let mut holes = Vec::new();
    for extent in extents {
        let number = |name: &str| extent[name].as_u64().expect("a number");
        assert_eq!(number("offset"), end, "a gap in {map}");
        end += number("length");
        match number("type") {
            0 => {}
            3 => holes.push((number("offset"), number("length"))),
            other => panic!("type {other} in {map}"),
        }
    }
    assert_eq!(end, SIZE, "all of it is told");
    holes
}

/// Bytes that a file takes on its disk.
fn taken(path: &Path) -> u64 {
    path.metadata().expect("it is there").blocks() * 512
}

#[test]
fn what_is_offered() {
    let cluster = mirrored();
    let uri = cluster.uri(Node::A);
    let info = json(&Tool::new("nbdinfo").args(["--json", &uri]).success());
    println!("{info:#}");
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["contexts"][0], "base:allocation");
    assert_eq!(export["contexts"].as_array().map(Vec::len), Some(1));
    for able in [
        "can_cache",
        "can_df",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(export[able], true, "{able}");
    }
    for unable in ["can_fast_zero", "is_read_only", "is_rotational"] {
        assert_eq!(export[unable], false, "{unable}");
    }
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
}

#[test]
fn holes_are_told() {
    let cluster = sparse();
    let uri = cluster.uri(Node::A);
    let expected = [
        (0, 4 * MIB),
        (6 * MIB, 34 * MIB),
        (41 * MIB, SIZE - 41 * MIB),
    ];
    assert_eq!(holes(&uri), expected);
    // QEMU reads the same from it.
    let map = Tool::new("qemu-img")
        .args(["map", "--output=json", "-f", "raw", &uri])
        .success();
    let map = json(&map);
    let zeroes: Vec<(u64, u64)> = map
        .as_array()
        .expect("a list of extents")
        .iter()
        .filter(|extent| extent["zero"] == true)
        .map(|extent| {
            let number = |name: &str| extent[name].as_u64().expect("a number");
            (number("start"), number("length"))
        })
        .collect();
    assert_eq!(zeroes, expected);

    // What is given back is a hole at once, and what is written is none.
    let mut client = cluster.nbd(Node::A);
    client.trim(4 * MIB, MIB as u32).expect("a trim");
    client
        .write(SIZE - MIB, &[1; 4096], false)
        .expect("a write");
    assert_eq!(
        holes(&uri),
        [
            (0, 5 * MIB),
            (6 * MIB, 34 * MIB),
            (41 * MIB, SIZE - 42 * MIB),
            (SIZE - MIB + 4096, MIB - 4096),
        ]
    );
}

#[test]
fn one_extent_at_a_time_and_ranges_that_begin_anywhere() {
    let cluster = sparse();
    let script = r#"
import nbd, sys
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
M = 1 << 20
def status(length, offset, flags=0):
    found = []
    def take(context, start, entries, error):
        assert (context, start) == ("base:allocation", offset)
        found.extend(zip(entries[::2], entries[1::2]))
    h.block_status(length, offset, take, flags)
    return found
assert status(64 * M, 0, nbd.CMD_FLAG_REQ_ONE) == [(4 * M, 3)]
assert status(M, 4 * M + 512, nbd.CMD_FLAG_REQ_ONE) == [(M, 0)]
assert status(2 * M, 5 * M + 512) == [(M - 512, 0), (M + 512, 3)]
assert status(512, 64 * M - 512) == [(512, 3)]
got = bytearray(b"\xff" * M)
def chunk(data, offset, kind, error):
    assert (len(data), offset) == (M, 3 * M + M // 2) and kind == nbd.READ_DATA
    got[:] = data
for flags in [0, nbd.CMD_FLAG_DF]:
    h.pread_structured(M, 3 * M + M // 2, chunk, flags)
    assert got == bytes(M // 2) + b"\x04" * (M // 2)
h.cache(64 * M, 0)
print("done")
"#;
    assert_eq!(nbd_script(script, &cluster.uri(Node::A)), "done\n");
}

#[test]
fn sparse_copies_keep_their_holes() {
    let cluster = sparse();
    let uri = cluster.uri(Node::A);
    let data = DATA.len() as u64 * MIB;

    let copy = cluster.directory().join("copy");
    Tool::new("nbdcopy").args([&uri]).arg(&copy).success();
    assert!(taken(&copy) < 2 * data, "{} bytes", taken(&copy));
    let disk = cluster.disk(Node::A);
    Tool::new("cmp").arg(&copy).arg(&disk).success();

    let converted = cluster.directory().join("converted");
    Tool::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw", &uri])
        .arg(&converted)
        .success();
    assert!(taken(&converted) < 2 * data, "{} bytes", taken(&converted));
    Tool::new("cmp").arg(&converted).arg(&disk).success();

    // The other way: holes arrive at both replicas as holes.
    let cluster = {
        drop(cluster);
        mirrored()
    };
    let original =
        std::fs::File::create(cluster.directory().join("original")).expect("a file can be made");
    original.set_len(SIZE).expect("a size");
    for at in DATA {
        use std::os::unix::fs::FileExt;
        original
            .write_all_at(&[9; MIB as usize], at * MIB)
            .expect("a write");
    }
    let original = cluster.directory().join("original");
    Tool::new("nbdcopy")
        .args(["--flush", "--destination-is-zero"])
        .arg(&original)
        .arg(cluster.uri(Node::A))
        .success();
    cluster.wait_mirrored();
    cluster.assert_identical();
    for node in Node::BOTH {
        let disk = cluster.disk(node);
        Tool::new("cmp").arg(&original).arg(&disk).success();
        assert!(taken(&disk) < 2 * data, "{} bytes", taken(&disk));
    }
}

#[test]
fn what_cannot_be_is_refused_by_number_and_the_connection_lives_on() {
    let cluster = mirrored();
    let script = r#"
import errno, nbd, sys

def connect(prepare=lambda h: None):
    h = nbd.NBD()
    h.set_strict_mode(0)
    prepare(h)
    h.connect_uri(sys.argv[1])
    return h

def ignore(*status):
    return 0

def expect(h, number, what, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, (what, error.errno, number)
        print(what, error.errno)
    else:
        assert number == 0, (what, "was not refused")
        print(what, "done")
    assert h.pread(512, 512) == b"\x05" * 512, (what, "and then?")

h = connect(lambda h: h.add_meta_context("base:allocation"))
end = h.get_size()
h.pwrite(b"\x05" * 1024, 0)
data = b"\x06" * 512
big = 33 << 20
for what, number, call in [
    ("read past the end", errno.EINVAL, lambda: h.pread(512, end)),
    ("read across the end", errno.EINVAL, lambda: h.pread(1024, end - 512)),
    ("read far past the end", errno.EINVAL, lambda: h.pread(512, 2**63 - 512)),
    ("write past the end", errno.ENOSPC, lambda: h.pwrite(data, end)),
    ("write much past the end", errno.ENOSPC, lambda: h.pwrite(bytes(16 << 20), end)),
    ("write across the end", errno.ENOSPC, lambda: h.pwrite(data + data, end - 512)),
    ("zero past the end", errno.ENOSPC, lambda: h.zero(512, end)),
    ("trim past the end", errno.EINVAL, lambda: h.trim(512, end)),
    ("cache past the end", errno.EINVAL, lambda: h.cache(512, end)),
    ("status past the end", errno.EINVAL, lambda: h.block_status(512, end, ignore)),
    ("read between sectors", errno.EINVAL, lambda: h.pread(512, 1)),
    ("read less than a sector", errno.EINVAL, lambda: h.pread(100, 0)),
    ("write between sectors", errno.EINVAL, lambda: h.pwrite(data, 100)),
    ("zero between sectors", errno.EINVAL, lambda: h.zero(512, 100)),
    ("trim between sectors", errno.EINVAL, lambda: h.trim(100, 0)),
    ("cache between sectors", errno.EINVAL, lambda: h.cache(100, 0)),
    ("status between sectors", errno.EINVAL, lambda: h.block_status(100, 0, ignore)),
    ("status of nothing", errno.EINVAL, lambda: h.block_status(0, 0, ignore)),
    ("read too much", errno.EINVAL, lambda: h.pread(big, 0)),
    ("read too much for a chunk", errno.EOVERFLOW, lambda: h.pread(big, 0, nbd.CMD_FLAG_DF)),
    ("write too much", errno.EINVAL, lambda: h.pwrite(bytes(big), 0)),
    ("write without holes", errno.EINVAL, lambda: h.pwrite(data, 0, nbd.CMD_FLAG_NO_HOLE)),
    ("zero fast", errno.EINVAL, lambda: h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)),
    ("write in one chunk", errno.EINVAL, lambda: h.pwrite(data, 0, nbd.CMD_FLAG_DF)),
    ("read one extent", errno.EINVAL, lambda: h.pread(512, 0, nbd.CMD_FLAG_REQ_ONE)),
    ("status in one chunk", errno.EINVAL,
     lambda: h.block_status(512, 0, ignore, nbd.CMD_FLAG_DF)),
    ("cache one extent", errno.EINVAL, lambda: h.cache(512, 0, nbd.CMD_FLAG_REQ_ONE)),
    ("an unknown flag", errno.EINVAL, lambda: h.trim(512, 0, 1 << 9)),
    ("read with FUA", 0, lambda: h.pread(512, 0, nbd.CMD_FLAG_FUA)),
    ("cache with FUA", 0, lambda: h.cache(512, 0, nbd.CMD_FLAG_FUA)),
    ("flush", 0, lambda: h.flush()),
]:
    expect(h, number, what, call)

plain = connect(lambda h: h.set_request_structured_replies(False))
assert not plain.can_df() and not plain.get_structured_replies_negotiated()
expect(plain, errno.EINVAL, "status without chunks", lambda: plain.block_status(512, 0, ignore))
expect(plain, errno.EINVAL, "one chunk without chunks", lambda: plain.pread(512, 0, nbd.CMD_FLAG_DF))
expect(plain, errno.EINVAL, "read past the end", lambda: plain.pread(512, end))

bare = connect()
assert bare.can_df() and not bare.can_meta_context("base:allocation")
expect(bare, errno.EINVAL, "status without a context", lambda: bare.block_status(512, 0, ignore))
assert h.pread(1024, 0) == b"\x05" * 1024, "nothing that was refused was done"
"#;
    print!("{}", nbd_script(script, &cluster.uri(Node::A)));
    cluster.wait_mirrored();
    cluster.assert_identical();
}
