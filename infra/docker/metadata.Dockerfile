# Metaflow's metadata service, which upstream runs as root because its migrations lie in root's folder.
#
#   docker build -f infra/docker/metadata.Dockerfile -t REGISTRY/matvlm-metadata:v2.5.0 .
FROM netflixoss/metaflow_metadata_service:v2.5.0
RUN chmod --recursive a+rX /root
USER 10001:10001
