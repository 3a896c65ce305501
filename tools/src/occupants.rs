//! Who uses a disk: mounts, swap, devices stacked on it, loop devices.
//!
//! `O_EXCL` keeps everybody off a device that is in use, but says no more than "busy"; a regular file
//! has nothing like it. Both are looked up here, in what the kernel shows of itself.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// One use of a disk. It ends before the disk can be Kagami's; no option overrides it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Occupant {
    /// A file system that is mounted.
    Mount {
        /// From which device or file.
        from: String,
        /// Where.
        at: String,
    },
    /// Swap space in use.
    Swap {
        /// The device or file.
        on: String,
    },
    /// A device of the kernel's on top of it: device mapper (LVM, LUKS, multipath), md, bcache.
    Holder {
        /// The disk or partition.
        of: String,
        /// The device on top.
        by: String,
    },
    /// A loop device made of the file.
    Loop {
        /// Its name.
        device: String,
    },
}

impl fmt::Display for Occupant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Occupant::Mount { from, at } => {
                write!(f, "{from} is mounted at {at}; umount {at} first")
            }
            Occupant::Swap { on } => write!(f, "{on} is in use as swap; swapoff {on} first"),
            Occupant::Holder { of, by } => write!(
                f,
                "{by} is built on {of}; take it down first (vgchange -an, cryptsetup close, mdadm \
                 --stop)"
            ),
            Occupant::Loop { device } => {
                write!(
                    f,
                    "/dev/{device} is made of it; losetup -d /dev/{device} first"
                )
            }
        }
    }
}

/// What the kernel shows of itself below a root directory.
#[derive(Debug)]
pub struct Kernel {
    root: PathBuf,
}

impl Kernel {
    /// The running one.
    pub fn running() -> Kernel {
        Kernel { root: "/".into() }
    }

    /// Who uses the device or file that this metadata is of, its partitions included.
    pub fn occupants(&self, store: &Metadata) -> Vec<Occupant> {
        let mut found = BTreeSet::new();
        if store.file_type().is_block_device() {
            self.of_device(store.rdev(), &mut found);
        } else {
            self.of_file(store, &mut found);
        }
        found.into_iter().collect()
    }

    /// The names of a device's partitions, as the kernel knows them; a file has none.
    pub fn partitions(&self, store: &Metadata) -> Vec<String> {
        if !store.file_type().is_block_device() {
            return Vec::new();
        }
        let device = self.device(store.rdev());
        let partitions = partition_directories(&device);
        let mut names: Vec<String> = partitions.iter().map(|it| name_of(it)).collect();
        names.sort();
        names
    }

    /// Whether the kernel refuses writes to the device.
    pub fn is_read_only(&self, store: &Metadata) -> bool {
        store.file_type().is_block_device()
            && line_of(&self.device(store.rdev()).join("ro")) == Some("1".to_owned())
    }

    fn of_device(&self, number: u64, found: &mut BTreeSet<Occupant>) {
        let whole = self.device(number);
        let mut parts = vec![(number, whole.clone())];
        parts.extend(
            partition_directories(&whole)
                .into_iter()
                .filter_map(|part| {
                    let number = parse_device(&line_of(&part.join("dev"))?)?;
                    Some((number, part))
                }),
        );
        for (number, directory) in parts {
            let name = name_of(&directory);
            let holders = entries(&directory.join("holders"));
            found.extend(holders.iter().map(|holder| Occupant::Holder {
                of: name.clone(),
                by: name_of(holder),
            }));
            found.extend(self.mounts_of(number).map(|at| Occupant::Mount {
                from: name.clone(),
                at,
            }));
            let is_it =
                |used: &Metadata| used.file_type().is_block_device() && used.rdev() == number;
            found.extend(
                self.swaps()
                    .filter(|swap| has(swap, is_it))
                    .map(|on| Occupant::Swap { on }),
            );
        }
    }

    fn of_file(&self, store: &Metadata, found: &mut BTreeSet<Occupant>) {
        let is_it = |used: &Metadata| (used.dev(), used.ino()) == (store.dev(), store.ino());
        found.extend(
            self.swaps()
                .filter(|swap| has(swap, is_it))
                .map(|on| Occupant::Swap { on }),
        );
        for device in entries(&self.root.join("sys/block")) {
            let backing = line_of(&device.join("loop/backing_file"));
            if backing.is_some_and(|backing| has(&backing, is_it)) {
                let device_name = name_of(&device);
                if let Some(number) = line_of(&device.join("dev")).and_then(|it| parse_device(&it))
                {
                    self.of_device(number, found);
                }
                found.insert(Occupant::Loop {
                    device: device_name,
                });
            }
        }
    }

    fn device(&self, number: u64) -> PathBuf {
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let link = self.root.join(format!("sys/dev/block/{major}:{minor}"));
        link.canonicalize().unwrap_or(link)
    }

    /// Where a device is mounted in this process's name space.
    fn mounts_of(&self, number: u64) -> impl Iterator<Item = String> {
        let text = fs::read_to_string(self.root.join("proc/self/mountinfo")).unwrap_or_default();
        let mounts: Vec<String> = text
            .lines()
            .filter_map(|line| mount_point(line, number))
            .collect();
        mounts.into_iter()
    }

    /// The devices and files in use as swap.
    fn swaps(&self) -> impl Iterator<Item = String> {
        let text = fs::read_to_string(self.root.join("proc/swaps")).unwrap_or_default();
        let swaps: Vec<String> = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next().map(unescape))
            .collect();
        swaps.into_iter()
    }
}

/// The mount point of a line of `mountinfo`, if it is this device's. File systems over several
/// devices (btrfs) have a number of their own, and name one of the devices as their source.
fn mount_point(line: &str, number: u64) -> Option<String> {
    let (fields, source) = line.split_once(" - ")?;
    let mut fields = fields.split(' ');
    let mounted = parse_device(fields.nth(2)?)?;
    let at = fields.nth(1)?;
    let is_it = |source: &Metadata| source.rdev() == number;
    let source = source.split(' ').nth(1).map(unescape)?;
    let from_it = source.starts_with("/dev/") && has(&source, is_it);
    (mounted == number || from_it).then(|| unescape(at))
}

fn has(path: &str, wanted: impl Fn(&Metadata) -> bool) -> bool {
    fs::metadata(path).is_ok_and(|metadata| wanted(&metadata))
}

fn partition_directories(device: &Path) -> Vec<PathBuf> {
    let mut all = entries(device);
    all.retain(|entry| entry.join("partition").exists());
    all
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

fn line_of(path: &Path) -> Option<String> {
    use std::io::Read;
    let mut text = String::new();
    File::open(path)
        .ok()?
        .take(1 << 16)
        .read_to_string(&mut text)
        .ok()?;
    Some(text.trim_end_matches('\n').to_owned())
}

/// `MAJOR:MINOR`
fn parse_device(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(nix::sys::stat::makedev(
        major.parse().ok()?,
        minor.parse().ok()?,
    ))
}

/// The kernel writes a blank in a path as `\040`.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let octal = part.get(..3).and_then(|it| u8::from_str_radix(it, 8).ok());
        match octal.filter(u8::is_ascii) {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    /// A kernel that says what a test tells it to.
    struct Fake {
        dir: TempDir,
    }

    impl Fake {
        fn new() -> Fake {
            let fake = Fake {
                dir: TempDir::new().unwrap(),
            };
            fake.tell("proc/self/mountinfo", "");
            fake.tell("proc/swaps", "Filename Type Size Used Priority\n");
            fake
        }

        fn tell(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        /// A disk with a partition, `8:16` and `8:17`.
        fn disk(&self) {
            self.tell("sys/block/sdb/dev", "8:16\n");
            self.tell("sys/block/sdb/ro", "0\n");
            self.tell("sys/block/sdb/sdb1/dev", "8:17\n");
            self.tell("sys/block/sdb/sdb1/partition", "1\n");
            let numbers = self.dir.path().join("sys/dev/block");
            fs::create_dir_all(&numbers).unwrap();
            symlink("../../block/sdb", numbers.join("8:16")).unwrap();
        }

        fn occupants(&self) -> Vec<String> {
            let kernel = self.kernel();
            let mut found = BTreeSet::new();
            kernel.of_device(parse_device("8:16").unwrap(), &mut found);
            found.iter().map(ToString::to_string).collect()
        }

        fn kernel(&self) -> Kernel {
            Kernel {
                root: self.dir.path().to_owned(),
            }
        }
    }

    #[test]
    fn a_disk_that_nobody_uses() {
        let fake = Fake::new();
        fake.disk();
        fake.tell(
            "proc/self/mountinfo",
            "22 1 254:1 / / rw - ext4 /dev/vda1 rw\n",
        );
        assert_eq!(fake.occupants(), [""; 0]);
    }

    #[test]
    fn a_mount_of_a_partition() {
        let fake = Fake::new();
        fake.disk();
        fake.tell(
            "proc/self/mountinfo",
            "22 1 254:1 / / rw - ext4 /dev/vda1 rw\n\
             30 22 8:17 / /srv/my\\040files rw,noatime shared:1 - xfs /dev/sdb1 rw\n",
        );
        let found = fake.occupants();
        assert_eq!(
            found,
            ["sdb1 is mounted at /srv/my files; umount /srv/my files first"]
        );
    }

    #[test]
    fn a_device_on_top_of_the_disk_or_its_partition() {
        let fake = Fake::new();
        fake.disk();
        fake.tell("sys/block/sdb/holders/dm-3/dev", "253:3\n");
        fake.tell("sys/block/sdb/sdb1/holders/md0/dev", "9:0\n");
        let found = fake.occupants();
        assert_eq!(found.len(), 2);
        assert!(found[0].starts_with("dm-3 is built on sdb; "), "{found:?}");
        assert!(found[1].starts_with("md0 is built on sdb1; "), "{found:?}");
    }

    #[test]
    fn a_file_that_is_swap_or_a_loop_device() {
        let fake = Fake::new();
        let file = fake.dir.path().join("a file");
        fs::write(&file, b"x").unwrap();
        let file_metadata = fs::metadata(&file).unwrap();
        let path = file.to_str().unwrap();
        assert_eq!(fake.kernel().occupants(&file_metadata), []);
        let escaped = path.replace(' ', "\\040");
        fake.tell(
            "proc/swaps",
            &format!("Filename Type\n{escaped} file 1 0 -2\n"),
        );
        fake.tell("sys/block/loop7/loop/backing_file", &format!("{path}\n"));
        fake.tell(
            "sys/block/loop8/loop/backing_file",
            "/nonexistent (deleted)\n",
        );
        assert_eq!(
            fake.kernel().occupants(&file_metadata),
            [
                Occupant::Swap {
                    on: path.to_owned()
                },
                Occupant::Loop {
                    device: "loop7".to_owned()
                }
            ]
        );
    }

    #[test]
    fn what_the_kernel_escapes() {
        for (text, plain) in [
            ("/srv/a", "/srv/a"),
            ("/a\\040b\\134c", "/a b\\c"),
            ("/a\\04", "/a\\04"),
            ("\\", "\\"),
            ("/ä\\é", "/ä\\é"),
        ] {
            assert_eq!(unescape(text), plain);
        }
    }
}
