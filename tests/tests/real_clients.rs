//! Clients no one here wrote, on a live mirror: what they wrote is on both replicas.

use kagami_tests::{
    Cluster, ClusterOptions, Deadline, GIB, MIB, Node, Process, Tool, require_root, wait_until,
};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

fn mirrored(size: u64) -> Cluster {
    Cluster::mirrored(ClusterOptions {
        disk_size: size,
        ..ClusterOptions::default()
    })
}

fn random_file(path: &Path, size: u64) {
    let mut file = File::create(path).expect("a file can be made");
    let mut random = fastrand::Rng::new();
    let mut piece = vec![0; MIB as usize];
    for at in 0..size / MIB {
        // Every fourth mebibyte is a hole, so that zeroes are copied too.
        random.fill(&mut piece);
        if at % 4 == 3 {
            piece.fill(0);
        }
        file.write_all(&piece).expect("a file can be written");
    }
}

#[test]
fn libnbd_tools() {
    let cluster = mirrored(256 * MIB);
    let uri = cluster.uri(Node::A);
    let info = Tool::new("nbdinfo").args(["--json", &uri]).success();
    let info: Value = serde_json::from_str(&info).expect("nbdinfo prints JSON");
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 256 * MIB);
    for able in [
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_multi_conn",
    ] {
        assert_eq!(export[able], true, "{able}");
    }
    let list = Tool::new("nbdinfo").args(["--list", &uri]).success();
    assert!(list.contains("r0"), "{list}");

    let original = cluster.directory().join("original");
    let copy = cluster.directory().join("copy");
    random_file(&original, 256 * MIB);
    Tool::new("nbdcopy")
        .args(["--connections=4", "--requests=64", "--flush"])
        .arg(&original)
        .arg(&uri)
        .success();
    Tool::new("nbdcopy")
        .args(["--connections=4", "--requests=64"])
        .arg(&uri)
        .arg(&copy)
        .success();
    Tool::new("cmp").arg(&original).arg(&copy).success();
    cluster.wait_mirrored();
    cluster.assert_identical();
    // External metadata: the disk itself is the copy.
    Tool::new("cmp")
        .arg(&original)
        .arg(cluster.disk(Node::B))
        .success();
}

#[test]
fn qemu_tools() {
    let cluster = mirrored(256 * MIB);
    let uri = cluster.uri(Node::A);
    let original = cluster.directory().join("original");
    random_file(&original, 256 * MIB);
    Tool::new("qemu-img")
        .args(["convert", "-n", "-f", "raw", "-O", "raw"])
        .arg(&original)
        .arg(&uri)
        .success();
    Tool::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw"])
        .arg(&original)
        .arg(&uri)
        .success();
    Tool::new("qemu-img")
        .args([
            "bench", "-f", "raw", "-t", "none", "-c", "20000", "-d", "32", "-s", "4096", "-w",
        ])
        .arg(&uri)
        .success();
    let qemu_io = |command: &str| {
        let output = Tool::new("qemu-io")
            .args(["-f", "raw", "-c", command, &uri])
            .success();
        assert!(!output.contains("failed"), "{command}: {output}");
    };
    for command in [
        "write -P 0x5a 1M 3M",
        "read -P 0x5a 1M 3M",
        "write -f -P 0x11 4096 512",
        "read -P 0x11 4096 512",
        "write -z 2M 1M",
        "read -P 0 2M 1M",
        "write -z -u 1M 512k",
        "read -P 0 1M 512k",
        "discard 3M 512k",
        "read -P 0x5a 3670016 512k",
        "flush",
    ] {
        qemu_io(command);
    }
    // Many at once, overlapping: whatever the order, it is the same one on both replicas.
    let overlapping: Vec<String> = (0..64)
        .flat_map(|n| {
            let offset = (n % 8) * 4096;
            [
                "-c".to_owned(),
                format!("aio_write -P {} {offset} 32k", n + 1),
            ]
        })
        .collect();
    Tool::new("qemu-io")
        .args(["-f", "raw", "-t", "none"])
        .args(overlapping)
        .args(["-c", "aio_flush", &uri])
        .success();
    cluster.wait_mirrored();
    cluster.assert_identical();
}

/// Unmounts and detaches in the right order, also when the test fails in between.
struct Mounts {
    undo: Vec<Tool>,
}

impl Mounts {
    fn add(&mut self, tool: Tool) {
        self.undo.push(tool);
    }

    fn undo(&mut self) {
        while let Some(tool) = self.undo.pop() {
            tool.success();
        }
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        while let Some(tool) = self.undo.pop() {
            // The test has failed already; the rest is tidying up.
            let _ = tool.output();
        }
    }
}

#[test]
fn a_file_system_with_a_real_tree() {
    require_root("mounting a file system");
    let cluster = mirrored(GIB);
    let fuse = cluster.directory().join("fuse");
    let tree = cluster.directory().join("mnt");
    for directory in [&fuse, &tree] {
        std::fs::create_dir(directory).expect("a directory can be made");
    }
    let disk = fuse.join("disk");
    let mut command = Tool::new("nbdfuse")
        .args(["-C", "4"])
        .arg(&disk)
        .arg(cluster.uri(Node::A))
        .into_command();
    let mut nbdfuse = Process::start("nbdfuse", &mut command);
    let mut mounts = Mounts { undo: Vec::new() };
    wait_until(Deadline::seconds(20), "nbdfuse to serve the disk", || {
        if disk.is_file() {
            Ok(())
        } else {
            Err(nbdfuse.describe())
        }
    });
    mounts.add(Tool::new("umount").arg(&fuse));
    let device = Tool::new("losetup")
        .args(["-f", "--show", "--direct-io=on"])
        .arg(&disk)
        .success();
    let device = device.trim().to_owned();
    mounts.add(Tool::new("losetup").args(["-d", &device]));
    Tool::new("mkfs.ext4").args(["-q", &device]).success();
    Tool::new("mount").arg(&device).arg(&tree).success();
    mounts.add(Tool::new("umount").arg(&tree));

    let source = large_tree();
    let copied = copy_up_to(&source, &tree, 300 * MIB);
    println!("copied {} files of {}", copied.len(), source.display());
    assert!(copied.len() > 100, "{} is no large tree", source.display());
    mounts.undo();
    wait_until(Deadline::seconds(20), "nbdfuse to end", || {
        nbdfuse.ended().map(drop).ok_or_else(|| nbdfuse.describe())
    });
    cluster.wait_mirrored();
    cluster.assert_identical();
    for node in Node::BOTH {
        Tool::new("fsck.ext4")
            .args(["-f", "-n"])
            .arg(cluster.disk(node))
            .success();
    }

    // The other node's own disk holds every file as it was copied.
    Tool::new("mount")
        .args(["-o", "loop,ro,noload"])
        .arg(cluster.disk(Node::B))
        .arg(&tree)
        .success();
    mounts.add(Tool::new("umount").arg(&tree));
    for path in &copied {
        let original = std::fs::read(source.join(path)).expect("a file that was just read");
        let mirrored = std::fs::read(tree.join(path)).expect("a file of the mirror");
        assert!(original == mirrored, "{} differs", path.display());
    }
    mounts.undo();
}

/// The largest tree of ordinary files that every machine which builds this has.
fn large_tree() -> PathBuf {
    let sysroot = Tool::new("rustc").args(["--print", "sysroot"]).success();
    let docs = PathBuf::from(sysroot.trim()).join("share");
    if docs.is_dir() {
        docs
    } else {
        PathBuf::from("/usr/share")
    }
}

/// Copies regular files until `limit` bytes; returns their paths relative to `from`.
fn copy_up_to(from: &Path, to: &Path, limit: u64) -> Vec<PathBuf> {
    let mut copied = Vec::new();
    let mut bytes = 0;
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        std::fs::create_dir_all(to.join(&directory)).expect("a directory can be made");
        let entries = std::fs::read_dir(from.join(&directory)).expect("a readable tree");
        for entry in entries.flatten() {
            let path = directory.join(entry.file_name());
            let metadata = entry.path().symlink_metadata().expect("a readable tree");
            if metadata.is_dir() {
                directories.push(path);
            } else if metadata.is_file() {
                bytes += metadata.len();
                if bytes > limit || copied.len() == 10_000 {
                    return copied;
                }
                std::fs::copy(entry.path(), to.join(&path)).expect("a file can be copied");
                copied.push(path);
            }
        }
    }
    copied
}
