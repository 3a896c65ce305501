//! `kagami create` on disks that hold something: a disk that was named by mistake must come out of it
//! as it went in.

mod host;

use host::Host;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;

/// Large enough for everything here but xfs, which begins at 300 MiB.
const SIZE: u64 = 16 * MIB;
const SIZE_OF_XFS: u64 = 320 * MIB;

/// How a disk comes to hold something.
enum Made {
    /// A program, its arguments before the disk, and what it reads.
    By(&'static str, &'static [&'static str], &'static str),
    /// Magic bytes in their places, for what no program makes on a file.
    Of(fn() -> Vec<(u64, Vec<u8>)>),
}
use Made::{By, Of};

fn little_endian(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn lvm() -> Vec<(u64, Vec<u8>)> {
    let label = [
        &b"LABELONE"[..],
        &little_endian(&[1, 0, 0, 32]),
        b"LVM2 001",
    ]
    .concat();
    vec![(512, label)]
}

fn luks() -> Vec<(u64, Vec<u8>)> {
    vec![(0, b"LUKS\xba\xbe\x00\x01".to_vec())]
}

/// Version 1.2, at 4 KiB.
fn md() -> Vec<(u64, Vec<u8>)> {
    let sectors = (SIZE / 512) as u32;
    let mut block = little_endian(&[0xa92b_4efc, 1, 0, 0]);
    block.resize(128, 0);
    block.extend(little_endian(&[0, 0, sectors, 0, 8, 0]));
    vec![(4096, block)]
}

/// Version 0.90, in the last 64 KiB: where internal metadata goes.
fn md_at_the_end() -> Vec<(u64, Vec<u8>)> {
    vec![(SIZE - 65536, little_endian(&[0xa92b_4efc, 0, 90]))]
}

fn btrfs() -> Vec<(u64, Vec<u8>)> {
    vec![(0x1_0040, b"_BHRfS_M".to_vec())]
}

fn two_at_once() -> Vec<(u64, Vec<u8>)> {
    // What a careless program leaves of the disk's former life.
    [btrfs(), vec![(0, b"LUKS\xba\xbe\x00\x01".to_vec())]].concat()
}

/// What is on the disk, how it comes there, and what `--overwrite` calls it.
const TABLE: &[(&str, Made, &str)] = &[
    ("ext4", By("mkfs.ext4", &["-q", "-F"], ""), "ext4"),
    ("xfs", By("mkfs.xfs", &["-q"], ""), "xfs"),
    ("swap space", By("mkswap", &[], ""), "swap"),
    ("a GPT", By("sfdisk", &["-q"], "label: gpt\n,,\n"), "gpt"),
    ("an MBR", By("sfdisk", &["-q"], "label: dos\n,,\n"), "dos"),
    ("a physical volume of LVM", Of(lvm), "LVM2_member"),
    ("LUKS", Of(luks), "crypto_LUKS"),
    ("a member of an md RAID", Of(md), "linux_raid_member"),
    (
        "an old member of an md RAID",
        Of(md_at_the_end),
        "linux_raid_member",
    ),
    ("btrfs without its checksum", Of(btrfs), "btrfs"),
    ("two things at once", Of(two_at_once), "crypto_LUKS,btrfs"),
];

fn make(made: &Made, disk: &Path) {
    let file = File::create(disk).unwrap();
    let size = match made {
        By("mkfs.xfs", ..) => SIZE_OF_XFS,
        By(..) | Of(_) => SIZE,
    };
    file.set_len(size).unwrap();
    match made {
        By(program, args, input) => tool(program, args, disk, input),
        Of(bytes) => {
            for (offset, bytes) in bytes() {
                file.write_all_at(&bytes, offset).unwrap();
            }
        }
    }
}

/// Runs a program of the system's, wherever administrators' programs are.
#[track_caller]
fn tool(program: &str, args: &[&str], disk: &Path, input: &str) {
    let search = std::env::var("PATH").unwrap_or_default();
    let mut child = Command::new(program)
        .env("PATH", format!("{search}:/usr/sbin:/sbin"))
        .args(args)
        .arg(disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; scripts/check installs it"));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {errors}");
}

#[test]
fn what_a_disk_holds_is_refused_and_left_as_it_is_until_it_is_named() {
    let host = Host::new("internal");
    for (what, made, names) in TABLE {
        make(made, &host.path("a.img"));
        let before = fs::read(host.path("a.img")).unwrap();
        for line in [
            "create",
            "create --force --yes",
            "create --overwrite reiserfs",
        ] {
            let said = host.refused(line, 4, "KGM-0210");
            let pass = format!("pass --overwrite {names}\n");
            assert!(said.contains("/a.img holds "), "{what}: {said}");
            assert!(said.ends_with(&pass), "{what}: {said}");
        }
        let after = fs::read(host.path("a.img")).unwrap();
        assert!(before == after, "{what} was changed");
        // One of several is not enough.
        if let Some((first, _)) = names.split_once(',') {
            host.refused(&format!("create --overwrite {first}"), 4, "KGM-0210");
        }
        host.done(&format!("create --overwrite {names}"));
        assert!(
            host.done("dump-metadata").contains("mirror r0, node a"),
            "{what}"
        );
    }
}

#[test]
fn the_same_in_the_place_of_the_metadata() {
    let host = Host::new("meta");
    for (what, made, names) in TABLE {
        File::create(host.path("a.img"))
            .unwrap()
            .set_len(SIZE)
            .unwrap();
        make(made, &host.path("meta"));
        let before = fs::read(host.path("meta")).unwrap();
        let said = host.refused("create", 4, "KGM-0210");
        assert!(said.contains("/meta holds "), "{what}: {said}");
        assert!(
            fs::read(host.path("meta")).unwrap() == before,
            "{what} was changed"
        );
        host.done(&format!("create --overwrite {names}"));
        // Nothing else is found in it afterwards: a second look sees Kagami alone.
        let said = host.refused("create", 4, "KGM-0208");
        assert!(said.ends_with("pass --force\n"), "{what}: {said}");
    }
}

#[test]
fn a_disk_beside_external_metadata_is_looked_at_too() {
    let host = Host::new("meta");
    make(&TABLE[0].1, &host.path("a.img"));
    let before = fs::read(host.path("a.img")).unwrap();
    host.refused("create", 4, "KGM-0210");
    assert!(
        !host.path("meta").exists(),
        "the metadata was made all the same"
    );
    let said = host.done("create --overwrite ext4");
    assert!(
        said.contains("a file system (ext4) stays in the data"),
        "{said}"
    );
    // The file system can become the mirror's data: not a byte of it was touched.
    assert!(fs::read(host.path("a.img")).unwrap() == before);
}

/// What lies where internal metadata goes would be found beside it ever after.
#[test]
fn what_is_given_up_at_the_tail_is_gone() {
    let host = Host::new("internal");
    for (made, name) in [
        (Of(md_at_the_end), "linux_raid_member"),
        (By("sfdisk", &["-q"], "label: gpt\n,,\n"), "gpt"),
    ] {
        make(&made, &host.path("a.img"));
        host.done(&format!("create --overwrite {name}"));
        let tail = fs::read(host.path("a.img"))
            .unwrap()
            .split_off((SIZE - 65536) as usize);
        let left = tail
            .windows(8)
            .any(|it| it == b"EFI PART" || it[..4] == 0xa92b_4efc_u32.to_le_bytes());
        assert!(!left, "{name}");
    }
}

#[test]
fn metadata_of_kagami_has_its_own_rules() {
    let host = Host::new("internal");
    host.done("create --size 64MiB");
    let own = fs::read(host.path("a.img")).unwrap();
    let [slot, other] = [SLOT, SLOT + 4096];
    let damage = |places: &[usize]| {
        let mut bytes = own.clone();
        for place in places {
            bytes[place + 2000] ^= 1;
        }
        bytes
    };
    let mut newer = own.clone();
    for place in [slot, other] {
        // The version, and the checksum that would be right for it.
        newer[place + 8] = 2;
        let checksum = crc32(&newer[place..place + 4096]);
        newer[place + 12..place + 16].copy_from_slice(&checksum.to_le_bytes());
    }
    let (force, name) = ("--force", "--overwrite kagami");
    for (what, cluster, mirror, bytes, code, id, option) in [
        ("its own", "c", "r0", own.clone(), 4, "KGM-0208", force),
        (
            "its own, half torn",
            "c",
            "r0",
            damage(&[slot]),
            4,
            "KGM-0208",
            force,
        ),
        (
            "damaged",
            "c",
            "r0",
            damage(&[slot, other]),
            1,
            "KGM-0205",
            name,
        ),
        (
            "another mirror's",
            "c",
            "r1",
            own.clone(),
            1,
            "KGM-0206",
            name,
        ),
        (
            "another cluster's",
            "d",
            "r0",
            own.clone(),
            1,
            "KGM-0206",
            name,
        ),
        ("of another version", "c", "r0", newer, 1, "KGM-0207", name),
    ] {
        host.configure(cluster, mirror, "internal");
        fs::write(host.path("a.img"), &bytes).unwrap();
        let wrong = if option == force { name } else { force };
        for line in ["create".to_owned(), format!("create {wrong}")] {
            let said = host.refused(&line, code, id);
            assert!(
                said.ends_with(&format!("pass {option}\n")),
                "{what}: {said}"
            );
        }
        assert!(
            fs::read(host.path("a.img")).unwrap() == bytes,
            "{what} was changed"
        );
        // None of them has served yet, so that there is no history to ask about.
        host.done(&format!("create {option}"));
        host.refused("create", 4, "KGM-0208");
    }
}

/// Where the first superblock slot is on a disk of 64 MiB with internal metadata.
const SLOT: usize = (64 << 20) - (64 << 10);

/// Of a metadata block, with the field of the checksum taken as zero.
fn crc32(block: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for (at, byte) in block.iter().enumerate() {
        let byte = if (12..16).contains(&at) { 0 } else { *byte };
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[test]
fn metadata_that_moved_is_found_in_its_old_place() {
    let host = Host::new("internal");
    host.done("create --size 64MiB");
    host.configure("c", "r1", "meta");
    let said = host.refused("create", 1, "KGM-0206");
    assert!(
        said.contains("/a.img holds Kagami metadata of mirror `r0` on node `a`"),
        "{said}"
    );
    assert!(!host.path("meta").exists());
}

#[test]
fn a_replica_with_a_file_system_in_it_needs_both_words() {
    let host = Host::new("internal");
    make(&TABLE[0].1, &host.path("a.img"));
    host.done("create --overwrite ext4");
    for line in ["create", "create --force", "create --overwrite ext4"] {
        let said = host.refused(
            line,
            4,
            if line.ends_with("force") {
                "KGM-0210"
            } else {
                "KGM-0208"
            },
        );
        assert!(said.ends_with("pass --force --overwrite ext4\n"), "{said}");
    }
    host.done("create --force --overwrite ext4");
}
