"""VHD, fixed, dynamic and differencing: what does this file or stream say?"""
